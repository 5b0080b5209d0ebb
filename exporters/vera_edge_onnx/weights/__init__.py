"""How a linear layer, a head or a table of embeddings is stored: floats, integer blocks, NF4, int8 rows."""
