#include "mutants.h"

extern "C" {
__attribute__((visibility("default"))) int fastconv_mutant = 0;
__attribute__((visibility("default"))) char fastconv_differed[fastconv_mutants] = {};
}
