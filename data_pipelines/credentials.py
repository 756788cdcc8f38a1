"""API keys, tokens and private keys, by the patterns of detect-secrets and a few that are younger than it.

Only patterns with a fixed mark of their issuer are used: entropy and variable names find ten examples in documentation
for one real key. What calls itself an example is left alone.
"""

import functools
import importlib
import re
from collections.abc import Iterator

PLUGINS = {
    "aws.AWSKeyDetector": "AWS access key",
    "azure_storage_key.AzureStorageKeyDetector": "Azure storage key",
    "github_token.GitHubTokenDetector": "GitHub token",
    "gitlab_token.GitLabTokenDetector": "GitLab token",
    "jwt.JwtTokenDetector": "JSON web token",
    "mailchimp.MailchimpDetector": "Mailchimp key",
    "npm.NpmDetector": "npm token",
    "openai.OpenAIDetector": "OpenAI key",
    "pypi_token.PypiTokenDetector": "PyPI token",
    "sendgrid.SendGridDetector": "SendGrid key",
    "slack.SlackDetector": "Slack token",
    "square_oauth.SquareOAuthDetector": "Square secret",
    "stripe.StripeDetector": "Stripe key",
}
"""The detectors of detect-secrets that are used, and what a finding is called."""

YOUNGER = {
    "Anthropic key": r"sk-ant-[a-z]+\d\d-[\w-]{80,120}",
    "OpenAI key": r"sk-(?:proj|svcacct|admin)-[\w-]{40,200}",
    "Hugging Face token": r"hf_[A-Za-z]{34}(?!\w)",
    "Google API key": r"AIza[\w-]{35}(?![\w-])",
    "GitHub token": r"github_pat_\w{82}(?!\w)",
}

MARKS = (
    "AKIA", "ASIA", "ABIA", "ACCA", "A3T", "AccountKey=", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_",
    "glpat-", "gldt-", "glft-", "glsoat-", "glrt-", "GR1348941", "glcbt-", "glimt-", "glptt-", "glagent-", "gloas-",
    "eyJ", "-us", "_authToken", "sk-", "pypi-Ag", "SG.", "xox", "hooks.slack", "sq0csp", "k_live_", "hf_", "AIza",
    "PRIVATE KEY",
)  # fmt: skip
"""One of these is in every text that any pattern matches: looking for them is a tenth of the cost."""

PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<kind>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:[\s\S]{0,8192}?-----END (?P=kind)-----"
    # Cut off: what there is of it, headers, lines of 40 letters and more, and the last line.
    r"|(?:(?:\s|\\n)+[A-Z][\w-]+: [^\n]*)*(?:(?:\s|\\n)+[A-Za-z0-9+/]{40,})+"
    r"(?:(?:\n|\\n)[A-Za-z0-9+/]+={0,2}(?![^\n\\\"']))?)?"
)
BODY = re.compile(r"[\w+/=.-]*")
PLACEHOLDER = re.compile(r"example|dummy|your[-_]|xxxx|(.)\1{7}", re.IGNORECASE)


def find_credentials(text: str) -> Iterator[tuple[str, int, int]]:
    """(what it is, start, end) of every key; a private key reaches to its end line, or as far as it goes."""
    if not any(mark in text for mark in MARKS):
        return
    if "PRIVATE KEY" in text:
        yield from (("private key", *match.span()) for match in PRIVATE_KEY.finditer(text))
    for name, pattern in patterns():
        for match in pattern.finditer(text):
            start, end = match.span()
            if name == "JSON web token":
                end = BODY.match(text, start).end()  # type: ignore[union-attr]  # may be empty, but matches
                if not _is_json_web_token(text[start:end].rstrip(".")):
                    continue
            before = text[start - 1 : start]
            if not (before.isalnum() or before == "_") and not PLACEHOLDER.search(text, start, end):
                yield name, start, end


@functools.cache
def patterns() -> list[tuple[str, re.Pattern[str]]]:
    """(what it finds, pattern): those of the detectors of detect-secrets, then the younger ones."""
    found = []
    for plugin, name in PLUGINS.items():
        module, _, detector = plugin.partition(".")
        denylist = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), detector).denylist
        # AWS's second pattern goes by the variable's name.
        found += [(name, pattern) for pattern in (denylist[:1] if module == "aws" else denylist)]
    return found + [(name, re.compile(pattern)) for name, pattern in YOUNGER.items()]


def _is_json_web_token(token: str) -> bool:
    from detect_secrets.plugins.jwt import JwtTokenDetector

    return bool(JwtTokenDetector.is_formally_valid(token))
