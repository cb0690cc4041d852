"""Network access: fetch trees from hub repositories and push them there."""
