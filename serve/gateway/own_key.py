"""The operator's key: the one in the key file, which may use everything without limits."""

from serve.gateway.api_keys import key_of, open_store
from serve.gateway.settings import GatewayConfig
from workbench.errors import UserError


async def own_key(settings: GatewayConfig, secret: str) -> None:
    """Let the operator's key into the store. Raises UserError where the store does not answer."""
    store = open_store(settings.store)
    try:
        if not await store.alive():
            raise UserError(f"gateway.store: nothing answers at {store.uri.split('@')[-1]}")
        await store.add(key_of(secret, "operator"))
    finally:
        await store.close()
