"""The page: generate, edit, look inside and compare in a browser (`maskgit app`)."""
