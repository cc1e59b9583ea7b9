"""Requests, KV blocks, step planning. No torch, no asyncio, no I/O, no clock of its own."""
