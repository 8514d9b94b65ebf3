"""What a job will take, said before it is run: tokens, steps, time, memory and disk, here and on a fleet of GPUs."""
