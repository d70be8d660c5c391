// Stands before the real one on the include path when csrc/cuda is compiled for the CPU.
#pragma once

#include "../cuda_emulator.h"
#define WK_HOPPER "../hopper_emulator.h"
