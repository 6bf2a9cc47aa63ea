// A part of a JPEG, by the libjpeg-turbo that Pillow has brought into the process. Rows and columns that a crop does not need are not
// transformed, upsampled or converted, and rows below it are only looked through for further segments; what is decoded is what all of
// it would have there, bit for bit. libjpeg's header may be missing where this is built, so what is used of its structs stands here.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace jpeg {

constexpr int kVersion = 62;  // of the interface, 6.2; the library compares this and the struct's size with its own
constexpr int kGrey = 1, kRgb = 2;
constexpr uint32_t kMargin = 2;  // columns at the edges of what is decoded have no neighbours to be upsampled with

struct Errors;

struct Source {  // how jpeg_source_mgr begins
  const uint8_t* next;
  size_t left;
};

struct Decompress {
  Errors* err;
  void *mem, *progress, *client_data;
  int is_decompressor, global_state;
  Source* src;
  uint32_t image_width, image_height;
  int num_components, jpeg_color_space, out_color_space;
  uint32_t scale_num, scale_denom;
  char between[60];
  uint32_t output_width, output_height;
  int out_color_components, output_components, rec_outbuf_height, actual_number_of_colors;
  void* colormap;
  uint32_t output_scanline;
  char counters[20];
  int (*coef_bits)[64];  // of progressive files, by component: how many bits are missing of each coefficient; -1: all
  char rest[432];
};
static_assert(offsetof(Decompress, output_scanline) == 168 && offsetof(Decompress, coef_bits) == 192 && sizeof(Decompress) == 632);

struct Errors {
  void (*error_exit)(Decompress*);
  void (*emit_message)(Decompress*, int level);
  void (*output_message)(Decompress*);
  char rest[256];  // the library's has 168 bytes in all
  std::jmp_buf jump;
  int warnings;
};

// The library's functions, whose addresses come from Python in this order.
struct Library {
  Errors* (*std_error)(Errors*);
  void (*create)(Decompress*, int version, size_t size);
  void (*mem_src)(Decompress*, const unsigned char*, unsigned long size);
  int (*read_header)(Decompress*, int require_image);
  int (*start)(Decompress*);
  void (*crop)(Decompress*, uint32_t* first, uint32_t* width);
  uint32_t (*skip)(Decompress*, uint32_t rows);
  uint32_t (*read)(Decompress*, uint8_t** rows, uint32_t count);
  void (*destroy)(Decompress*);
};

struct Part {
  const uint8_t* file;
  size_t size;
  uint32_t width, height;             // of the whole image as it is decoded: at 1/1, 1/2, 1/4 or 1/8 of its size
  uint32_t top, bottom, left, right;  // what is wanted of it
  int channels;
  uint8_t* to;  // [bottom - top, room, channels]
  uint32_t room;
};

// Whether nothing but one scan and the end of the image is left to be read: damage there is warned of and gives other pixels, and only
// further segments can be such that all of the image is refused. Of images of several scans all was read before the first row.
inline bool is_one_scan(const Source& source) {
  const uint8_t *at = source.next, *end = at + source.left;
  while (at != end && (at = static_cast<const uint8_t*>(std::memchr(at, 0xFF, size_t(end - at))))) {
    if (++at == end) return false;
    if (*at == 0xD9) return at + 1 == end;
    if (*at == 0xFF) continue;                                // fills
    if (*at != 0 && (*at < 0xD0 || *at > 0xD7)) return false;  // neither a byte 0xFF nor a restart
  }
  return source.left == 0;
}

// Whether no scan of a progressive file is missing. Else blocks are smoothed, and those at the edges of a part lack neighbours.
inline bool is_complete(const Decompress& d) {
  if (!d.coef_bits) return true;
  const int* bits = d.coef_bits[0];
  return std::all_of(bits, bits + 64 * d.num_components, [](int missing) { return missing == 0; });
}

// The first column of what was decoded; -1: it is for others to say what is wrong with the file. The library leaves by longjmp, so
// nothing here has a destructor.
inline int64_t decode(const Library& library, const Part& part) {
  Errors errors;
  Decompress d;
  d.err = library.std_error(&errors);
  errors.error_exit = [](Decompress* of) { std::longjmp(of->err->jump, 1); };
  errors.emit_message = [](Decompress* of, int level) { of->err->warnings += level < 0; };
  errors.output_message = [](Decompress*) {};
  errors.warnings = 0;
  d.mem = nullptr;
  if (setjmp(errors.jump)) {
    library.destroy(&d);
    return -1;
  }
  library.create(&d, kVersion, sizeof d);
  library.mem_src(&d, part.file, part.size);
  library.read_header(&d, 1);
  uint32_t scale = 1;
  const auto scaled = [&](uint32_t side) { return (side + scale - 1) / scale; };
  while (scale < 8 && (scaled(d.image_width) != part.width || scaled(d.image_height) != part.height)) scale *= 2;
  d.out_color_space = part.channels == 1 ? kGrey : kRgb;
  d.scale_num = 1, d.scale_denom = scale;
  library.start(&d);
  uint32_t first = part.left - std::min(part.left, kMargin), width = std::min(part.right + kMargin, part.width) - first;
  bool good = d.output_width == part.width && d.output_height == part.height && d.output_components == part.channels;
  good = good && is_one_scan(*d.src) && is_complete(d);
  if (good && width < part.width) library.crop(&d, &first, &width);  // which begins at a block's first column
  good = good && width <= part.room && (!part.top || library.skip(&d, part.top) == part.top);
  while (good && d.output_scanline < part.bottom) {
    uint8_t* row = part.to + size_t(d.output_scanline - part.top) * part.room * part.channels;
    good = library.read(&d, &row, 1) == 1;
  }
  good = good && !errors.warnings;
  library.destroy(&d);
  return good ? int64_t(first) : -1;
}

}  // namespace jpeg
