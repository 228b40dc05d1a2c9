// Preloaded, it puts each tensor of PyTorch's between two pages that nobody may touch: at the end
// of its own pages, or at their start with LORA_EXT_GUARD=left. What is freed is never touched
// again.
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {
constexpr size_t kPage = 4096, kPages = size_t{1} << 28;

char* reserve(size_t bytes, int access) {
  void* start = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) abort();
  return static_cast<char*>(start);
}

struct Range {
  char* const start = reserve(kPages * kPage, PROT_NONE);
  // By the first page of an allocation, how many it has.
  uint32_t* const pages =
      reinterpret_cast<uint32_t*>(reserve(kPages * sizeof(uint32_t), PROT_READ | PROT_WRITE));
  std::atomic<size_t> next{1};
  const bool left = std::getenv("LORA_EXT_GUARD") != nullptr &&
                    !std::strcmp(std::getenv("LORA_EXT_GUARD"), "left");

  bool has(const void* p) const { return p >= start && p < start + kPages * kPage; }
};

Range& range() {
  static Range* const the = new Range;
  return *the;
}
}  // namespace

// c10's allocator of CPU tensors calls this one.
extern "C" int posix_memalign(void** out, size_t alignment, size_t size) {
  Range& all = range();
  const size_t pages = (size + kPage - 1) / kPage, first = all.next.fetch_add(pages + 1);
  if (alignment > kPage || first + pages >= kPages) return ENOMEM;
  char* const start = all.start + first * kPage;
  if (pages > 0 && mprotect(start, pages * kPage, PROT_READ | PROT_WRITE) != 0) return ENOMEM;
  std::memset(start, 0xFE, pages * kPage);
  all.pages[first] = static_cast<uint32_t>(pages);
  const size_t used = (size + alignment - 1) / alignment * alignment;
  *out = all.left ? start : start + pages * kPage - used;
  return 0;
}

extern "C" void free(void* p) {
  static void (*const real)(void*) = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_NEXT, "free"));
  Range& all = range();
  if (!all.has(p)) return real(p);
  const size_t first = (static_cast<char*>(p) - all.start) / kPage;
  char* const start = all.start + first * kPage;
  const int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (all.pages[first] > 0) mmap(start, all.pages[first] * kPage, PROT_NONE, how, -1, 0);
}
