"""Network access: fetch trees from Hub repositories and push them there."""
