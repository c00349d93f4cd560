// The runtime's packing, loader and dequantization, callable from Python.

#include "pack_tensor.cuh"
#include "q_matrix.cuh"

extern "C" void pack_codes(const uint16_t* codes, uint32_t* words, int inputs, int rows, int outputs, int bits)
{
    pack_columns_cuda(nullptr, codes, words, inputs, rows, outputs, bits);
}

extern "C" void pack_scales(const uint16_t* scales, uint32_t* words, int groups, int outputs)
{
    pack_rows_4_cuda(nullptr, scales, words, groups, outputs);
}

// Loads a matrix, which shuffles `q_weight` in place, and writes its weights (inputs, outputs).
extern "C" void reconstruct(uint32_t* q_weight, uint16_t* q_perm, uint16_t* q_invperm, uint32_t* q_scale,
                            half* q_scale_max, uint16_t* q_groups, uint16_t* q_group_map, int inputs, int outputs,
                            int groups, half* weights)
{
    QMatrix matrix(nullptr, 0, inputs, outputs, groups, q_weight, q_perm, q_invperm, q_scale, q_scale_max, q_groups,
                   q_group_map, nullptr, nullptr, nullptr, nullptr, nullptr, 0);
    matrix.reconstruct(nullptr, weights);
}

// The conversions of the cache, which q_matrix.cu names and nothing here calls.
void array_q_to_fp16_kv_cuda(cudaStream_t, const unsigned char*, const half*, half*, const unsigned char*,
                             const half*, half*, int, int, int, int, int, int)
{
    abort();
}

void array_fp16_to_q_kv_cuda(cudaStream_t, const half*, unsigned char*, half*, const half*, unsigned char*, half*,
                             int, int, int, int, int, int)
{
    abort();
}
