"""How many peers the records hold, for a command that has nothing else to do with them."""

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from backend.adapters.records.tables import peers


def count_recorded_peers(url: str) -> int:
    """Count them, whatever the schema's version; 0 where there is no database, or none that answers."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        return 0
    engine = sa.create_engine(parsed)
    try:
        with engine.connect() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(peers)) or 0
    except SQLAlchemyError:
        return 0
    finally:
        engine.dispose()
