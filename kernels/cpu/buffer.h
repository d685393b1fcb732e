// Memory for what a step computes in.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <new>

// Memory by the cache line that only grows; zeroed when it does, so that padding is zero.
class Buffer {
 public:
  ~Buffer() { free(data_); }
  template <class T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      free(data_);
      data_ = nullptr;
      size_ = 0;
      if (posix_memalign(&data_, 64, bytes) != 0) throw std::bad_alloc();
      memset(data_, 0, bytes);
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};
