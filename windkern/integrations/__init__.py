"""Bridges to other libraries; nothing in the core imports them."""
