"""How OpenAPI is told of the credential: RFC 6750's header, for which viewers show an Authorize button."""

from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase


class BearerScheme(SecurityBase):
    """A dependency of this class makes its endpoints ask for the header, in the schema. It checks nothing."""

    scheme_name = "Bearer"
    model = HTTPBearer(
        bearerFormat="ocw_<id>_<secret>", description="An operator's key, or a node's enrolment token."
    )
