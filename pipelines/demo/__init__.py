"""The whole product on drawn street scenes."""
