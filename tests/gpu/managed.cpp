// Memory for NumPy arrays and torch's CPU tensors that a GPU reads and writes too: see managed.py.
//
// NumPy's side is its data allocator (NEP 49), torch's side its CPU allocator.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <dlfcn.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

namespace {

constexpr unsigned kAttachGlobal = 1;

int (*get_current)(void**);
int (*set_current)(void*);
int (*allocate_managed)(unsigned long long*, size_t, unsigned);
int (*release_managed)(unsigned long long);
void* primary = nullptr;

std::mutex guard;
std::unordered_map<void*, size_t> sizes;

void* allocate(size_t bytes) {
  void* current = nullptr;
  if (get_current(&current) == 0 && current == nullptr) set_current(primary);  // a thread's first allocation
  unsigned long long address = 0;
  if (int status = allocate_managed(&address, bytes ? bytes : 1, kAttachGlobal)) {
    std::fprintf(stderr, "cuMemAllocManaged of %zu bytes: error %d\n", bytes, status);
    std::abort();  // ordinary memory instead would be an illegal access later, far from here
  }
  void* found = reinterpret_cast<void*>(address);
  std::lock_guard<std::mutex> hold(guard);
  sizes[found] = bytes;
  return found;
}

void release(void* address) {
  if (address == nullptr) return;
  {
    std::lock_guard<std::mutex> hold(guard);
    sizes.erase(address);
  }
  release_managed(reinterpret_cast<unsigned long long>(address));  // fails at exit, when nothing is left to free
}

struct ManagedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = ::allocate(bytes);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t count) const override {
    std::memcpy(target, source, count);
  }
};

template <class T>
bool find(void* library, const char* name, T& function) {
  function = reinterpret_cast<T>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

extern "C" {

void* numpy_malloc(void*, size_t bytes) { return allocate(bytes); }
void* numpy_calloc(void*, size_t count, size_t bytes) { return std::memset(allocate(count * bytes), 0, count * bytes); }
void numpy_free(void*, void* address, size_t) { release(address); }
void* numpy_realloc(void*, void* address, size_t bytes) {
  void* target = allocate(bytes);
  size_t before = 0;
  {
    std::lock_guard<std::mutex> hold(guard);
    auto found = sizes.find(address);
    if (found != sizes.end()) before = found->second;
  }
  std::memcpy(target, address, before < bytes ? before : bytes);
  release(address);
  return target;
}

// Torch's CPU tensors come from the driver of this name from now on. 0, or what failed: 1 the library, 2 its
// functions, 3 the primary context of its first device.
int install(const char* driver) {
  void* library = dlopen(driver, RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) return 1;
  int (*initialise)(unsigned);
  int (*retain)(void**, int);
  const bool whole = find(library, "cuInit", initialise) && find(library, "cuDevicePrimaryCtxRetain", retain) &&
                     find(library, "cuCtxGetCurrent", get_current) && find(library, "cuCtxSetCurrent", set_current) &&
                     find(library, "cuMemAllocManaged", allocate_managed) &&
                     find(library, "cuMemFree_v2", release_managed);
  if (!whole) return 2;
  if (initialise(0) || retain(&primary, 0)) return 3;
  static ManagedAllocator* allocator = new ManagedAllocator;  // tensors may outlive everything
  c10::SetCPUAllocator(allocator, 255);
  return 0;
}

size_t live() {
  std::lock_guard<std::mutex> hold(guard);
  return sizes.size();
}
}
