"""Routers, one file each: which experts see what."""
