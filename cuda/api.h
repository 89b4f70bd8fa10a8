// How the functions that compress/ops/native.py calls are exported.
#pragma once

#if defined(_WIN32)
#define COMPRESS_API extern "C" __declspec(dllexport)
#else
#define COMPRESS_API extern "C" __attribute__((visibility("default")))
#endif
