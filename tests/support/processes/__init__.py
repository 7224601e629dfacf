"""Commands and servers in processes of their own, mostly forked."""
