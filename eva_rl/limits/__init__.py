"""What this process may use of the machine: CPU threads and memory, as the container and the scheduler grant them."""
