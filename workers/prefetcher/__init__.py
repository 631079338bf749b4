"""The prefetcher: reads bundles from flash straight into their slots, many at once.

Read in this order: `requests.py` (which bytes go where), `backend.py` (what a queue must be able to
do; `io_uring.py`, `threads.py` and `aiofiles_backend.py` do it), `queues.py` (which of them is used),
`pool.py` (several queues, their errors and their counters), `__main__.py` (the worker).
"""
