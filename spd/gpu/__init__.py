"""One rank of a tensor-parallel model at the speed of its GPU: fused weights, compiled half blocks, CUDA graphs."""
