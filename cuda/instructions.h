// The instruction sets that loops are compiled for, by the numbers that compress/ops/native.py gives.
#pragma once

namespace compress {

enum Instructions : int { kBase, kAvx2, kAvx512 };

}  // namespace compress
