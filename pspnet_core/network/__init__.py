"""PSPNet and its parts."""
