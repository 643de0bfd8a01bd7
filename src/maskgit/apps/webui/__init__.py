"""The page: static files over the server's public endpoints (`maskgit app`, and `maskgit serve` at /)."""
