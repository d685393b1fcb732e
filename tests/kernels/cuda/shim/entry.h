// A kernel's way in from Python: host.py writes one PAGEHOLD_ENTRY for each kernel of a file.
#pragma once

#include <type_traits>
#include <utility>

#include "engine.h"

namespace shim {

inline thread_local char static_shared_anchor;

template <typename P>
constexpr char code() {  // what a parameter must be given: see CODES in host.py
  if (std::is_pointer_v<P>) return 'p';
  if (std::is_same_v<P, float>) return 'f';
  if (std::is_same_v<P, double>) return 'd';
  if (std::is_integral_v<P> && sizeof(P) == 4) return 'i';
  if (std::is_integral_v<P> && sizeof(P) == 8) return 'l';
  return '?';
}

template <auto kKernel, typename... P>
struct Trampoline {
  static constexpr char kCodes[] = {code<P>()..., '\0'};
  template <size_t... kIndex>
  static void spread(void** arguments, std::index_sequence<kIndex...>) {
    kKernel(*static_cast<std::remove_cv_t<P>*>(arguments[kIndex])...);
  }
  static void call(void** arguments) { spread(arguments, std::index_sequence_for<P...>()); }
};

template <auto kKernel, typename... P>
Trampoline<kKernel, P...> trampoline(void (*)(P...));

}  // namespace shim

#define PAGEHOLD_ENTRY(name)                                                                                        \
  extern "C" __attribute__((visibility("default"))) const char* parameters_of_##name() {                            \
    return decltype(shim::trampoline<name>(name))::kCodes;                                                          \
  }                                                                                                                 \
  extern "C" __attribute__((visibility("default"))) int launch_##name(const shim::Launch* launch, void** arguments, \
                                                                      char* message, size_t size) {                 \
    const shim::Entry entry{#name, decltype(shim::trampoline<name>(name))::call, &shim::static_shared_anchor};      \
    return shim::run(*launch, entry, arguments, message, size);                                                     \
  }
