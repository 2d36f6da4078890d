"""One folder per operation; inside, the same rooms: reference, function, triton_kernels, step."""
