"""asyncio primitives that know nothing of Flynn."""
