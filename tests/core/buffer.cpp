#include "buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "check.h"

#if defined(__SANITIZE_ADDRESS__)
#    include <sanitizer/asan_interface.h>
#else
#    define ASAN_POISON_MEMORY_REGION(address, bytes) (static_cast<void>(address), static_cast<void>(bytes))
#    define ASAN_UNPOISON_MEMORY_REGION(address, bytes) (static_cast<void>(address), static_cast<void>(bytes))
#endif

namespace core_tests {
namespace {

constexpr unsigned char slack = 0xC5;
Place current = Place::heap;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

const char* name_of(Place place) {
    switch (place) {
        case Place::heap:
            return "heap";
        case Place::heap_plus_1:
            return "heap_plus_1";
        case Place::page_end:
            return "page_end";
        case Place::page_start:
            return "page_start";
    }
    return "?";
}

Place place() { return current; }
void set_place(Place to) { current = to; }

// [first_, last_) may be touched, [data_, data_ + bytes_) is the array; all null for an empty array on the heap.
Memory::Memory(size_t bytes, size_t element, unsigned char fill, const char* file, int line)
    : place_(current), file_(file), line_(line), bytes_(bytes) {
    if (on_pages()) {
        const size_t page = page_bytes(), inside = (bytes / page + (bytes % page || bytes == 0)) * page;
        map_bytes_ = inside + 2 * page;
        void* map = mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED || mprotect(static_cast<char*>(map) + page, inside, PROT_READ | PROT_WRITE) != 0)
            throw std::bad_alloc();
        map_ = static_cast<unsigned char*>(map);
        first_ = map_ + page;
        last_ = first_ + inside;
        data_ = place_ == Place::page_start ? first_ : last_ - bytes;
    } else if (const size_t shift = place_ == Place::heap_plus_1 ? element : 0; bytes + shift > 0) {
        first_ = static_cast<unsigned char*>(malloc(bytes + shift));
        if (!first_) throw std::bad_alloc();
        last_ = first_ + bytes + shift;
        data_ = first_ + shift;
    } else {
        return;
    }
    memset(first_, slack, static_cast<size_t>(last_ - first_));
    memset(data_, fill, bytes);
    ASAN_POISON_MEMORY_REGION(first_, static_cast<size_t>(data_ - first_));
    ASAN_POISON_MEMORY_REGION(data_ + bytes, static_cast<size_t>(last_ - data_) - bytes);
}

Memory::~Memory() {
    if (!first_) return;
    ASAN_UNPOISON_MEMORY_REGION(first_, static_cast<size_t>(last_ - first_));
    check_slack("before", first_, data_);
    check_slack("after", data_ + bytes_, last_);
    if (map_)
        munmap(map_, map_bytes_);
    else
        free(first_);
}

void Memory::check_slack(const char* side, const unsigned char* first, const unsigned char* last) const {
    for (const unsigned char* byte = first; byte < last; ++byte)
        if (*byte != slack) return fail(file_, line_, text("something wrote ", side, " the array made here"));
}

}  // namespace core_tests
