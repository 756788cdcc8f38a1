"""Documents in a database that SQLAlchemy reaches: ``source: postgresql+psycopg://reader@host/db``, and a query."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.columns import Columns
from data_pipelines.sources import Row
from workbench.errors import UserError

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, CursorResult, Engine

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
        from sqlalchemy.exc import SQLAlchemyError

        line = 0
        engine = _engine(self.url)
        try:
            with engine.connect() as connection:
                for record in _execute(connection, self.statement, ROWS_AT_ONCE).mappings():
                    line += 1
                    yield self.columns.row(dict(record), f"{self.name}:{line}")
        except (SQLAlchemyError, UnicodeDecodeError) as error:
            yield Row(self.name, "", f"{self.name}:{line + 1}", f"unreadable rows ({type(error).__name__})")
        finally:
            engine.dispose()


def query_rows(url: str, statement: str, columns: Columns) -> Query:
    """The documents that ``statement`` (SQL, or TABLE, or SCHEMA.TABLE) gives in the database at ``url``.

    Raises UserError if the database is not reached, or the result lacks a column.
    """
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    if not statement:
        raise UserError("query: say what to read of the database, a table's name or SQL: query=documents")
    try:
        parsed = _parsed(url)
        shown = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "sqlite" and parsed.database and not Path(parsed.database).is_file():
            raise UserError(f"source: no such SQLite file: {parsed.database}")
        engine = _engine(url)
    except ModuleNotFoundError as error:
        raise UserError(f"source: the driver of {shown} is not installed; type: pip install {error.name}") from None
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise UserError(f"source: not a database URL that SQLAlchemy knows: {error}") from None
    try:
        with engine.connect() as connection:
            if not any(space in statement.strip() for space in " \n\t"):
                names = map(engine.dialect.identifier_preparer.quote, statement.strip().split("."))
                statement = f"SELECT * FROM {'.'.join(names)}"
            found = _execute(connection, statement, 1)
            if not found.returns_rows:
                raise UserError("query: it gives no rows; write a SELECT")
            present = list(found.keys())
    except SQLAlchemyError as error:
        raise UserError(f"source: {shown}: {str(getattr(error, 'orig', None) or error).splitlines()[0]}") from None
    finally:
        engine.dispose()
    columns.check(present, shown)
    return Query(url, parsed.database or parsed.get_backend_name(), statement, columns)


def _parsed(url: str) -> "URL":
    from sqlalchemy import make_url

    try:
        return make_url(url)
    except ValueError:  # whose message may show a part of the password
        raise UserError(
            "source: the port in the database URL is no number; in a password write %40 for @, %3A for : and %2F for /"
        ) from None


def _execute(connection: "Connection", statement: str, rows_at_once: int) -> "CursorResult[Any]":
    """What ``statement`` gives, streamed; it goes to the database as it is, with any : and % in it."""
    return connection.execution_options(yield_per=rows_at_once, no_parameters=True).exec_driver_sql(statement)


def _engine(url: str) -> "Engine":
    from sqlalchemy import create_engine, event
    from sqlalchemy.pool import NullPool

    engine = create_engine(url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":  # which else ends at the first text that is not UTF-8

        @event.listens_for(engine, "connect")
        def _lenient(connection: Any, _: Any) -> None:
            connection.text_factory = lambda given: given.decode("utf-8", "surrogateescape")

    return engine
