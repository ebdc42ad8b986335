// Arrays that end exactly where their memory ends, so that one element read or written too many is found. Every array
// of a test lies in the place that the runner chose:
//   heap        malloc of exactly this size: AddressSanitizer watches both sides; an empty array is a null pointer
//   heap_plus_1 the same, one element further: an address that is aligned to its element and to nothing more
//   page_end    the last byte before a page that may not be touched: this also finds what no compiler instruments
//   page_start  the first byte after such a page
// Fresh memory is NaN in floating point and a large odd number in integers: an output that was not written shows. What
// lies between an array and the end of its allocation must stay as it was.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace core_tests {

enum class Place { heap, heap_plus_1, page_end, page_start };

constexpr Place places[] = {Place::heap, Place::heap_plus_1, Place::page_end, Place::page_start};
const char* name_of(Place place);
Place place();  // of the arrays made from now on
void set_place(Place to);

class Memory {
  public:
    Memory(size_t bytes, size_t element, unsigned char fill, const char* file, int line);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    void* data() const { return data_; }

  private:
    bool on_pages() const { return place_ == Place::page_end || place_ == Place::page_start; }
    void check_slack(const char* side, const unsigned char* first, const unsigned char* last) const;

    Place place_;
    const char* file_;
    int line_;
    size_t bytes_;
    unsigned char *map_ = nullptr, *first_ = nullptr, *data_ = nullptr, *last_ = nullptr;
    size_t map_bytes_ = 0;
};

template <typename T>
class Buffer {
  public:
    explicit Buffer(int64_t size, const char* file = __builtin_FILE(), int line = __builtin_LINE())
        : size_(size), memory_(new Memory(static_cast<size_t>(size) * sizeof(T), sizeof(T), fill(), file, line)) {}

    // element(i) for each i
    template <typename Element>
    Buffer(int64_t size, Element element, const char* file = __builtin_FILE(), int line = __builtin_LINE())
        : Buffer(size, file, line) {
        for (int64_t i = 0; i < size; ++i) data()[i] = element(i);
    }

    explicit Buffer(const std::vector<T>& from, const char* file = __builtin_FILE(), int line = __builtin_LINE())
        : Buffer(static_cast<int64_t>(from.size()), file, line) {
        std::copy(from.begin(), from.end(), data());
    }

    T* data() const { return static_cast<T*>(memory_->data()); }
    int64_t size() const { return size_; }
    T& operator[](int64_t i) { return data()[i]; }
    const T& operator[](int64_t i) const { return data()[i]; }

  private:
    static constexpr unsigned char fill() { return std::is_integral<T>::value ? 0x6B : 0xFF; }  // all ones are a NaN

    int64_t size_;
    std::unique_ptr<Memory> memory_;
};

}  // namespace core_tests
