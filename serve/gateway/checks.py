"""What can be seen to be wrong in the gateway's settings before it starts."""

from collections.abc import Collection

from serve.gateway.settings import GatewayConfig
from serve.keys import read_key
from workbench.errors import UserError


def check_settings(settings: GatewayConfig, models: Collection[str]) -> None:
    """Raise UserError for a name that is neither one of ``models`` nor an upstream's, and for a file that cannot be
    read."""
    there = sorted({*models, *settings.upstreams})
    policies = {"gateway.defaults": settings.defaults}
    policies |= {f"gateway.models.{name}": policy for name, policy in settings.models.items()}
    named = [(f"gateway.models.{name}", name) for name in settings.models]
    named += [(f"{place}.fallback", name) for place, policy in policies.items() for name in policy.fallback]
    named += [(f"gateway.routes.{route}", name) for route, weights in settings.routes.items() for name in weights]
    for place, name in named:
        if name not in there:
            raise UserError(f"{place}: no model is called '{name}'; there are {', '.join(there)}")
    for name, upstream in settings.upstreams.items():
        if upstream.api_key_file is not None:
            try:
                read_key(upstream.api_key_file)
            except UserError as error:
                raise UserError(f"gateway.upstreams.{name}.api_key_file: {error}") from None
    if settings.rag.template is not None:
        from serve.citations import load_template  # it brings the search, which takes seconds to load

        load_template(settings.rag.template)
