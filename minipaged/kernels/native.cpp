// Kernels for a CPU. native.py compiles this file for the machine it runs on.
#include "attention.h"
#include "forward.h"

// For ctypes: each function exists twice, once per dtype.
#define P const void *
#define N int64_t
#define EXPORT(suffix, T)                                                                                              \
    extern "C" void paged_decode_##suffix(P q, N q_row, P k_cache, P v_cache, P tables, N table_row, P lens,           \
                                          void *out, N B, N H, N KH, N D, N S, double scale, N window) {               \
        paged_decode((const T *)q, q_row, (const T *)k_cache, (const T *)v_cache, (const int64_t *)tables, table_row,  \
                     (const int64_t *)lens, (T *)out, B, H, KH, D, S, float(scale), window);                           \
    }                                                                                                                  \
    extern "C" void forward_##suffix(const Model *model, const Step *step) { forward<T>(*model, *step); }
EXPORT(float32, float)
EXPORT(bfloat16, bf16)
