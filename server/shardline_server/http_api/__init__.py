"""The HTTP door: OpenAI's API and the operator's endpoints."""
