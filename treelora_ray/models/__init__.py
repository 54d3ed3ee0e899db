"""Backbones, adapters, the head, and the router."""
