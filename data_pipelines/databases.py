"""Documents in a database that SQLAlchemy reaches: ``source: postgresql+psycopg://reader@host/db``, and a query."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.columns import Columns
from data_pipelines.sources import Row, is_sound
from workbench.errors import UserError

if TYPE_CHECKING:
    from sqlalchemy import Engine

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Query:
    """The rows that ``statement`` gives, streamed; one item, because a query has one order and one end."""

    url: str
    name: str
    statement: str
    columns: Columns
    size: int = 1

    def rows(self) -> Iterator[Row]:
        """Its documents; where the database breaks off, a row says so."""
        from sqlalchemy import text
        from sqlalchemy.exc import SQLAlchemyError

        line = 0
        engine = _engine(self.url)
        try:
            with engine.connect() as connection:
                found = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(text(self.statement))
                for record in found.mappings():
                    line += 1
                    if any(isinstance(value, str) and not is_sound(value) for value in record.values()):
                        yield Row(self.name, "", f"{self.name}:{line}", "undecodable row")
                    else:
                        yield self.columns.row(dict(record), f"{self.name}:{line}")
        except (SQLAlchemyError, UnicodeDecodeError) as error:
            yield Row(self.name, "", f"{self.name}:{line + 1}", f"unreadable rows ({type(error).__name__})")
        finally:
            engine.dispose()


def query_rows(url: str, statement: str, columns: Columns) -> Query:
    """The documents that ``statement`` (SQL, or the name of a table) gives in the database at ``url``.

    Raises UserError if the database is not reached, or the result lacks a column.
    """
    from sqlalchemy import make_url, text
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    if not statement:
        raise UserError("query: say what to read of the database, a table's name or SQL: query=documents")
    try:
        parsed = make_url(url)
        shown = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "sqlite" and parsed.database and not Path(parsed.database).is_file():
            raise UserError(f"source: no such SQLite file: {parsed.database}")
        engine = _engine(url)
    except ModuleNotFoundError as error:
        raise UserError(f"source: the driver of {shown} is not installed; type: pip install {error.name}") from None
    except (ArgumentError, NoSuchModuleError) as error:
        raise UserError(f"source: not a database URL that SQLAlchemy knows: {error}") from None
    try:
        with engine.connect() as connection:
            if not any(space in statement.strip() for space in " \n\t"):
                statement = f"SELECT * FROM {engine.dialect.identifier_preparer.quote(statement.strip())}"
            found = connection.execution_options(yield_per=1).execute(text(statement))
            if not found.returns_rows:
                raise UserError("query: it gives no rows; write a SELECT")
            present = list(found.keys())
    except SQLAlchemyError as error:
        raise UserError(f"source: {shown}: {str(getattr(error, 'orig', None) or error).splitlines()[0]}") from None
    finally:
        engine.dispose()
    columns.check(present, shown)
    return Query(url, parsed.database or parsed.get_backend_name(), statement, columns)


def _engine(url: str) -> "Engine":
    from sqlalchemy import create_engine, event
    from sqlalchemy.pool import NullPool

    engine = create_engine(url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":  # which else ends at the first text that is not UTF-8

        @event.listens_for(engine, "connect")
        def _lenient(connection: Any, _: Any) -> None:
            connection.text_factory = lambda given: given.decode("utf-8", "surrogateescape")

    return engine
