// The loops over prepared rows, for one instruction set: COMPRESS_INSTRUCTIONS names it, the compiler's options choose
// it. Nothing that another file might define as well is used here: the linker could keep the copy with instructions
// that a machine lacks.
#include <cstring>
#include <type_traits>

#include "half_prepared.h"

#if defined(__AVX2__)
#include "half_prepared_avx2.h"
#else
#include "half_prepared_base.h"
#endif

#define COMPRESS_JOIN_(a, b) a##b
#define COMPRESS_JOIN(a, b) COMPRESS_JOIN_(a, b)

namespace compress {
namespace {

constexpr PreparedLoops kLoops = {arrange_floats, arrange_integers, dot_floats, dot_integers};

}  // namespace

const PreparedLoops* COMPRESS_JOIN(prepared_loops_, COMPRESS_INSTRUCTIONS)() { return &kLoops; }

}  // namespace compress
