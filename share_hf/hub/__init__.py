"""The network: trees in hub repositories, fetched and pushed."""
