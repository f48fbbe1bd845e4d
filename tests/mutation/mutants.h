// Switches between the mutants of a kernel file that rewrite.py has rewritten.
#pragma once

inline constexpr int fastconv_mutants = 1 << 16;
extern "C" {
extern int fastconv_mutant;                       // which one runs; 0: none
extern char fastconv_differed[fastconv_mutants];  // which ones would have taken another way, so far
}

inline bool fastconv_mutate(int number, bool original, bool mutated) {
  if (original != mutated) __atomic_store_n(&fastconv_differed[number], 1, __ATOMIC_RELAXED);
  return fastconv_mutant == number ? mutated : original;
}
