"""The shared cache by content: the store, who makes and uses its entries, and what it holds."""
