"""Many rings on many machines, by Ray: `serve` puts them behind Ray Serve, `prompts` behind Ray Data.

The extra `ray` installs what both need. Every ring is one actor with one budget, which it asks Ray for, too.
"""
