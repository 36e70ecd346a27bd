"""Large pictures: the same layers, band of rows by band of rows, in bounded memory."""
