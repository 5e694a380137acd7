"""Ray: the session, how actors share a cluster, and Ray Data as we use it."""
