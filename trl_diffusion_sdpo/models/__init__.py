"""Networks and their weights: loaded, wrapped, frozen, and kept in second copies as reference or average."""
