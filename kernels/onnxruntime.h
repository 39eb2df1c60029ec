/* What an operator needs of ONNX Runtime's C interface, version 20 (ONNX Runtime 1.20 and later).

   Wheels bring no headers. The interface is a table of functions to which releases only append, so a place in it names
   a function for good; `struct operator` is `OrtCustomOp` up to the members of that version. */

#include <stddef.h>
#include <stdint.h>

#define API_VERSION 20

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtShape OrtShape; /* OrtTensorTypeAndShapeInfo */
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;

typedef void *function;
typedef const function *OrtApi;
typedef struct {
    OrtApi (*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

/* Names of element types and of what an input or output may be, as the interface counts them. */
enum element { FLOAT = 1, INT32 = 6, INT64 = 7, BOOL = 9, HALF = 10 };
enum presence { REQUIRED, OPTIONAL };
enum failure { FAIL = 1, INVALID_ARGUMENT = 2 };

/* Places in the table. */
#define CALL(place, ...) ((OrtStatus * (*)(__VA_ARGS__)) api[place])
#define CREATE_STATUS CALL(0, int code, const char *message)
#define CREATE_DOMAIN CALL(26, const char *name, OrtCustomOpDomain **)
#define ADD_OPERATOR CALL(27, OrtCustomOpDomain *, const struct operator *)
#define ADD_DOMAIN CALL(28, OrtSessionOptions *, OrtCustomOpDomain *)
#define DATA CALL(51, OrtValue *, void **)
#define DIMENSION_COUNT CALL(61, const OrtShape *, size_t *)
#define DIMENSIONS CALL(62, const OrtShape *, int64_t *, size_t)
#define SHAPE CALL(65, const OrtValue *, OrtShape **)
#define ATTRIBUTE_FLOAT CALL(85, const OrtKernelInfo *, const char *, float *)
#define ATTRIBUTE_INT CALL(86, const OrtKernelInfo *, const char *, int64_t *)
#define INPUT CALL(90, const OrtKernelContext *, size_t, const OrtValue **)
#define OUTPUT CALL(91, OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **)
#define PARALLEL_FOR CALL(274, const OrtKernelContext *, void (*)(void *, size_t), size_t total, size_t batches, void *)
#define RELEASE_STATUS(status) ((void (*)(OrtStatus *))api[93])(status)
#define RELEASE_SHAPE(shape) ((void (*)(OrtShape *))api[99])(shape)

struct operator {
    uint32_t version;
    void *(*create_first)(const struct operator *, OrtApi, const OrtKernelInfo *); /* of the first version */
    const char *(*name)(const struct operator *);
    const char *(*provider)(const struct operator *);
    enum element (*input_type)(const struct operator *, size_t);
    size_t (*input_count)(const struct operator *);
    enum element (*output_type)(const struct operator *, size_t);
    size_t (*output_count)(const struct operator *);
    void (*compute_first)(void *, OrtKernelContext *);
    void (*destroy)(void *);
    enum presence (*input_presence)(const struct operator *, size_t);
    enum presence (*output_presence)(const struct operator *, size_t);
    int (*memory)(const struct operator *, size_t);
    int (*variadic[4])(const struct operator *);
    OrtStatus *(*create)(const struct operator *, OrtApi, const OrtKernelInfo *, void **kernel);
    OrtStatus *(*compute)(void *kernel, OrtKernelContext *);
    OrtStatus *(*infer_shapes)(const struct operator *, void *);
    int (*first_version)(const struct operator *);
    int (*last_version)(const struct operator *);
    size_t (*in_place)(int **inputs, int **outputs);
    void (*release_in_place)(int *inputs, int *outputs);
    size_t (*aliases)(int **inputs, int **outputs);
    void (*release_aliases)(int *inputs, int *outputs);
};
