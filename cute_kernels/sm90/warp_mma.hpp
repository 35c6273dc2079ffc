#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>

// Products of one warp by mma.sync, and how it reads their operands from shared memory.
namespace cute_kernels::sm90 {

/// Four matrices of 8 rows of 16 bytes: lane 8 i + r knows where row r of the i-th is, and gets 4
/// bytes of each: those from 4 (lane % 4) on of row lane / 4.
CUTLASS_DEVICE void load_matrices(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

/// The same, transposed in pairs of bytes: a lane gets pair lane / 4 of row 2 (lane % 4) and of the
/// next one.
CUTLASS_DEVICE void load_matrices_transposed(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

/// C += A B of float16, 16 x 8 x 16. Of rows lane / 4 and 8 further, a lane has in A columns
/// 2 (lane % 4) and the next one of either row, then those 8 further; in C columns
/// 2 (lane % 4) and the next one of either row. In B it has these rows of column lane / 4.
CUTLASS_DEVICE void multiply_add(float (&c)[4], uint4 const& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

/// The same, 16 x 8 x 8: of A and B what is first there.
CUTLASS_DEVICE void multiply_add(float (&c)[4], uint2 const& a, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(b));
}

}  // namespace cute_kernels::sm90
