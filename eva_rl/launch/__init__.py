"""Many runs: local processes, Ray, Slurm, and sweeps over them."""
