"""How is BullMQ 6.7 used? With a Queue and a Worker of Node.js, as its guide begins.

The client and the worker are bullmq.js, so only the constants stand here.
"""

from __future__ import annotations

NODE_PINS = ["bullmq@6.7.0", "ioredis@5.11.1"]
ABOUT = "Node.js, one job at a time (its default); results are stored (its default)"
SAFE = "yes, runs again after 30 to 60 s"
CLIENT = "node bullmq.js client"
WORKERS = {"Node.js": ("node bullmq.js worker 1", 1500)}
CONCURRENT = {"Node.js": ("node bullmq.js worker {c}", ["coroutines"], 3000)}
LACKS = {"import": "it is no library of Python"}
ENQUEUES = 1500
SHORT = "`lockDuration: 2000` (30,000), `stalledInterval: 2000` (30,000)"
LEASE = {"usual": "30000", "short": "2000"}
