"""What engines look for at every start, whoever serves: small, and importing neither torch nor `moe` until it is asked for."""
