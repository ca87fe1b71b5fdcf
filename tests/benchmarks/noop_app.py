"""What FastAPI itself costs: the same body, the same server, and nothing done."""

from fastapi import FastAPI
from pydantic import BaseModel

from backend.models.wireguard.provisioning import ProvisioningRequest

app = FastAPI()


class Done(BaseModel):
    """The answer."""

    status: str


@app.post("/noop")
async def noop(request: ProvisioningRequest) -> Done:
    """Answer."""
    return Done(status=request.node_id)
