#include "processor.h"

#include <cpuid.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <string>

namespace {

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}

// The kernel makes room for tile registers only in processes that asked (Linux, Documentation/arch/x86/xstate.rst);
// threads that start later have what their process has.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

bool has_amx() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr uint32_t kBfloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBfloat16 | kTile | kInt8;
  return (edx & kAll) == kAll && may_use_tiles();
}

struct Isa {
  const char* name;
  bool (*present)();
  const IsaTable* (*table)(bool bfloat16_inputs);
};

bool always() { return true; }

constexpr Isa kIsas[] = {
    {"portable", always, portable_table},
    {"avx2", has_avx2, avx2_table},
    {"avx512bf16", has_avx512bf16, avx512bf16_table},
    {"amx", has_amx, amx_table},
};

bool present(const Isa& isa) {
#ifdef PAGEHOLD_EMULATE
  if (isa.table == avx512bf16_table || isa.table == amx_table) return has_avx2();
#endif
  return isa.present();
}

}  // namespace

const IsaTable* choose_isa(const char* name, bool bfloat16_inputs) {
  const Isa* found = nullptr;
  for (const Isa& isa : kIsas)
    if ((name == nullptr || strcmp(isa.name, name) == 0) && present(isa)) found = &isa;
  return found != nullptr ? found->table(bfloat16_inputs) : nullptr;
}

const char* isa_names() {
  static const std::string names = [] {
    std::string all;
    for (const Isa& isa : kIsas)
      if (present(isa)) all += all.empty() ? isa.name : std::string(" ") + isa.name;
    return all;
  }();
  return names.c_str();
}
