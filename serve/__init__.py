"""Models behind OpenAI-compatible endpoints: vLLM under Ray Serve, questions to documents, load tests."""

from serve.availability import available

__all__ = ["available"]
