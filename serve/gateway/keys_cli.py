"""``workbench serve keys add|list|revoke``: the gateway's API keys.

A change holds from the next request on, in every replica: the store is asked for each.
"""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import typer

from workbench.errors import UserError

T = TypeVar("T")
Store = Annotated[str, typer.Option(help="sqlite:///FILE or redis://HOST:PORT/DB; default: RUNS/.secrets/gateway.db")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]

keys_app = typer.Typer(help="API keys of the gateway: add, list, revoke.", no_args_is_help=True, rich_markup_mode=None)


def _with_store(store: str, work: Callable[[Any], Awaitable[T]]) -> T:
    """Do ``work`` with the open store. Raises UserError where it does not answer."""
    from serve.gateway.api_keys import open_store
    from serve.gateway.settings import GatewayConfig

    async def opened() -> T:
        found = open_store(GatewayConfig(store=store).store)
        try:
            if not await found.alive():
                raise UserError(f"store: nothing answers at {found.uri.split('@')[-1]}")
            return await work(found)
        finally:
            await found.close()

    return asyncio.run(opened())


@keys_app.command()
def add(
    owner: Annotated[str, typer.Argument(help="Whose key it is; shown in metrics and logs.")],
    model: Annotated[list[str] | None, typer.Option(help="A model it may use; repeat it. Default: all.")] = None,
    requests: Annotated[int, typer.Option(min=0, help="Requests a minute; 0: no limit.")] = 0,
    tokens: Annotated[int, typer.Option(min=0, help="Tokens a minute, prompts and answers; 0: no limit.")] = 0,
    budget: Annotated[float, typer.Option(min=0, help="Cost a calendar month (UTC); 0: no limit.")] = 0.0,
    store: Store = "",
    as_json: AsJson = False,
) -> None:
    """Make a key and print it: once, for only its digest is kept."""
    from serve.gateway.api_keys import new_key

    if not owner.strip() or not owner.isprintable():
        raise UserError("owner: give a name")
    if not math.isfinite(budget):
        raise UserError("--budget: give a number; 0 is no limit")
    key, secret = new_key(
        owner.strip(), models=model or [], requests_per_minute=requests, tokens_per_minute=tokens, budget=budget
    )
    _with_store(store, lambda opened: opened.add(key))
    if as_json:
        print(json.dumps({"id": key.id, "owner": key.owner, "key": secret}))
        return
    print(secret)
    typer.echo(f"key {key.id} of {key.owner}; it is not shown again", err=True)


@keys_app.command("list")
def list_keys(store: Store = "", as_json: AsJson = False) -> None:
    """Show the keys, their limits and what they have used this month; never the keys themselves."""
    from dataclasses import asdict

    from serve.gateway.api_keys import month

    async def read(opened: Any) -> list[dict[str, Any]]:
        now = month(time.time())
        return [
            {**{k: v for k, v in key.row().items() if k != "digest"}, **asdict(await opened.usage(key.id, now))}
            for key in await opened.keys()
        ]

    rows = _with_store(store, read)
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{'id':<14}{'owner':<20}{'models':<24}{'req/min':>8}{'tok/min':>9}{'budget':>10}  used this month")
    for row in rows:
        limits = [f"{row[name] or '-'}" for name in ("requests_per_minute", "tokens_per_minute", "budget")]
        used = (
            f"{row['requests']} requests, {row['prompt_tokens'] + row['completion_tokens']} tokens, {row['cost']:.4g}"
        )
        models = ",".join(row["models"]) or "all"
        print(f"{row['id']:<14}{row['owner']:<20}{models:<24}{limits[0]:>8}{limits[1]:>9}{limits[2]:>10}  {used}")


@keys_app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="Its id, as 'list' shows it.")], store: Store = "") -> None:
    """Make a key worthless from the next request on."""
    if not _with_store(store, lambda opened: opened.revoke(key_id)):
        raise UserError(f"there is no key {key_id}: 'workbench serve keys list' shows them")
    print(f"revoked {key_id}")
